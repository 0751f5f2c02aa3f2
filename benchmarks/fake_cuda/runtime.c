/* A CUDA runtime and driver that claim one GPU and do nothing.
 *
 * torch's CUDA build, started with this library preloaded, finds a device: its autograd, autocast
 * and choice of kernels then work on fake tensors of device "cuda", which have no memory and launch
 * no kernel. Here is only what torch asks for on that way. Anything else reaches the real runtime,
 * which fails without a driver, as it should.
 *
 *     cc -shared -fPIC -Wl,-soname,libcuda.so.1 -DMAJOR=9 -DMINOR=0 -o runtime.so runtime.c
 *
 * The soname makes it the driver as well: torch opens libcuda.so.1 by name.
 */
#include <stddef.h>
#include <string.h>

/* Compute capability: 9.0 is Hopper, 8.0 is Ampere. */
#ifndef MAJOR
#define MAJOR 9
#endif
#ifndef MINOR
#define MINOR 0
#endif

/* The beginning of cudaDeviceProp of CUDA 13; torch's own struct goes on behind it. */
struct properties {
    char name[256], uuid[16], luid[8];
    unsigned luid_mask;
    size_t total_memory, shared_memory;
    int registers, warp_size;
    size_t pitch;
    int block_threads, block_size[3], grid_size[3];
    size_t constant_memory;
    int major, minor;
    size_t texture_alignment, texture_pitch_alignment;
    int multiprocessors;
};

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetLastError(void) { return 0; }

int cudaGetDeviceProperties(struct properties *of, int device) {
    memset(of, 0, sizeof *of);
    strcpy(of->name, "a GPU that is not there");
    of->total_memory = 80ull << 30;
    of->shared_memory = 48 << 10;
    of->warp_size = 32;
    of->block_threads = 1024;
    of->major = MAJOR;
    of->minor = MINOR;
    of->multiprocessors = 132;
    return 0;
}

/* Attributes 75 and 76 are the capability's two numbers. */
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? MAJOR : attribute == 76 ? MINOR : 0;
    return 0;
}

/* autograd notes the current stream of each tensor; the default one needs not be made. */
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *status) { *status = 0; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 0;
    return 0;
}
