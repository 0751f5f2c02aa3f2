"""Reward functions in processes that can be killed, under limits of time and memory.

Three kinds of processes take part:

- The trainer (`client.py`) sends calls to one server and reads the replies.
- The server (`server.py`) is a fresh interpreter. It loads the functions once and stays
  single-threaded, so that it can fork. Forking the trainer is unsafe: it runs an engine, a
  tokenizer or a CUDA context.
- A worker (`worker.py`) is forked from the server in milliseconds and runs one call at a time. The
  server's pool (`pool.py`) times the calls (`timed_worker.py`, `import_clock.py`), and kills a
  worker together with everything it started.

The standard library's fork server imports the main program again in every worker, and there is only
one of it per program.
"""
