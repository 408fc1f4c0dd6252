"""Draw one sample of every class with an exported student; all it needs is onnxruntime, numpy and Pillow.

python examples/onnx_inference.py student.onnx samples.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
student = json.loads(session.get_modelmeta().custom_metadata_map["pyard"])
if student["form"] != "sampler" or student["num_classes"] is None:
    sys.exit(f"{sys.argv[1]}: expected a class-conditional student that was exported with --form sampler")
labels = np.arange(student["num_classes"], dtype=np.int64)
noise = np.random.default_rng(0).standard_normal((len(labels), *student["sample_shape"]), dtype=np.float32)

(samples,) = session.run(["sample"], {"noise": noise, "label": labels})

if samples.dtype == np.uint8:  # [B, H, W, 3]: the file has a decoder
    pixels = samples
else:  # float32 [B, C, H, W], -1 black, 1 white: red, green and blue, or the first channel in grey
    shown = samples.transpose(0, 2, 3, 1) if samples.shape[1] == 3 else samples[:, 0]
    pixels = np.round((shown.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
picture = Image.fromarray(np.hstack(list(pixels)))
scale = max(1, 64 // pixels.shape[1])
picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(sys.argv[2])
print(f"{len(labels)} samples, {student['num_steps']} network passes each, in {sys.argv[2]}")
