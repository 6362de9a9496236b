"""The model for other runtimes: ONNX files that onnxruntime, OpenVINO and transformers.js in a browser run.

    paligemma export tiny exported/ --weights fp32,q8 --check

`graphs.py` is the place to begin: the three graphs, and what they take and return.
"""
