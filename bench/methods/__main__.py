"""python -m bench.methods"""

from bench.methods.run import main

main()
