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
labels = np.arange(student["num_classes"], dtype=np.int64)
noise = np.random.default_rng(0).standard_normal((len(labels), *student["sample_shape"]), dtype=np.float32)

(samples,) = session.run(["sample"], {"noise": noise, "label": labels})  # float32 [B, C, H, W], -1 black, 1 white

pixels = np.round((samples[:, 0].clip(-1, 1) + 1) * 127.5).astype(np.uint8)  # [B, H, W], the first channel
picture = Image.fromarray(np.hstack(list(pixels)))
picture.resize((picture.width * 8, picture.height * 8), Image.Resampling.NEAREST).save(sys.argv[2])
print(f"{len(labels)} samples, {student['num_steps']} network passes each, in {sys.argv[2]}")
