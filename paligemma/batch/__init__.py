"""Many pictures, on one machine or many: a list of rows, frozen in a folder, answered shard by shard.

    paligemma batch "detect dog ; cat" photos --out answers

`run.py` is the way in. What makes it safe to interrupt is in three files: `folder.py` (what lies in the folder),
`leases.py` (who works on what) and `shards.py` (how a shard becomes a part). `Predictor` answers rows inside anybody's
own Ray Data pipeline. docs/batch.md explains how to use all of it.
"""

from paligemma.batch.predictor import Predictor

__all__ = ["Predictor"]
