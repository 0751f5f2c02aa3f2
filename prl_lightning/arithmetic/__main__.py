"""``python -m prl_lightning.arithmetic '{"folder": "runs/arithmetic"}'``: make the folder."""

import json
import sys

from prl_lightning.arithmetic.prepare import ArithmeticTask

ArithmeticTask(**json.loads(sys.argv[1])).make()
