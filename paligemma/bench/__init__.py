"""The speed benchmark: how fast the model is on this machine, beside the machine's limits and beside transformers.

machine.py              what the machine is, and its limits: reading memory, multiplying matrices
shapes.py               the published shapes with random weights; how much work is in them
worker.py               one model in a process of its own: load it, answer, time every stage
transformers_model.py   transformers' model, timed in the same way, where transformers is installed
decoding.py             decoding, step by step and as one graph; on a GPU transformers too
serving.py              servers under load, beside transformers serve
training.py             training steps, beside a bare loop and transformers with peft
run.py                  all models in turn, round after round; the record
summary.py              the runs of a record -> its figures
records.py              what every record begins with, and its file
tables.py plot.py       a record -> tables, a picture
"""
