"""Opens an exported directory as its model card says, with whatever transformers this Python has.

    python open_exported.py DIRECTORY PICTURE INSTRUCTION OUT [ADAPTERS]

Needs torch, torchvision and transformers alone (peft too, for ADAPTERS), so that another virtual
environment can run it. Writes OUT (npz): the prompt's ids, the logits behind each of them, and the
ids of eight tokens decoded greedily; prints the version of transformers.
"""

import sys

import numpy as np
import torch

if torch.version.cuda is None:
    # A torchvision built for CUDA has no operators beside a torch without it, and does not import
    # without these. Processors use none.
    torchvision_ops = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        torchvision_ops.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")

import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

directory, picture, instruction, out, *adapters = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
if adapters:
    from peft import PeftModel

    model = PeftModel.from_pretrained(model, adapters[0])
    # PEFT passes over what it does not find
    loaded = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert loaded and all(p.abs().max() > 0 for p in loaded), "adapters were not loaded"
processor = AutoProcessor.from_pretrained(directory)
question = [{"type": "image"}, {"type": "text", "text": instruction}]
messages = [{"role": "user", "content": question}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=[text], images=[Image.open(picture)], return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits[0]
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
assert isinstance(processor.decode(answer, skip_special_tokens=True), str)
np.savez(
    out,
    ids=inputs["input_ids"][0],
    logits=logits.float(),
    answer=answer[inputs["input_ids"].shape[1] :],
    grid=inputs["image_grid_thw"],
)
print(transformers.__version__)
