"""python -m bench.precision [OUT.json]"""

import sys

from bench.kernels.precision import main

if __name__ == "__main__":
    main(sys.argv[1:])
