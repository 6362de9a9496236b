"""How fast the model is on this machine, beside what the machine could do and beside transformers.

machine.py      what the machine is, and its limits: reading memory, multiplying matrices
shapes.py       the published shapes with random weights; how much work is in them
contestant.py   one model in a process of its own: load it, answer, time every stage
peer.py         transformers' model on the same clock, where transformers is installed
run.py          contestants in turn, round after round; the record
report.py       record -> table
plot.py         record -> picture
"""
