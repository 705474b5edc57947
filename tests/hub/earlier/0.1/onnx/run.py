"""Classify a picture: python run.py PICTURE"""
import json, pathlib, sys
import numpy as np, onnxruntime
from PIL import Image
here = pathlib.Path(__file__).parent
how, labels = (json.loads((here / name).read_text()) for name in ("preprocessing.json", "labels.json"))
image = Image.open(sys.argv[1]).convert("RGB")
image = image.resize((64, 64), Image.Resampling.BILINEAR)
pixels = (np.asarray(image, np.float32) / 255 - np.float32(how["mean"])) / np.float32(how["std"])
x = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])
logits = onnxruntime.InferenceSession(here / "resnet_2_vit_1.onnx").run(None, {"pixel_values": x})[0][0]
print(labels[logits.argmax()])
