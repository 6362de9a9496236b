"""`Predictor`: PaliGemma as a step of anybody's own pipeline. (To be filled.)"""

from __future__ import annotations


class Predictor:
    pass
