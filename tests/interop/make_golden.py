"""Makes the golden files with torch and transformers: `make golden` (runs in the environment of
`make peers`).

For every case of golden_models.py `golden/<case>.npz` holds what transformers computes in float32:

  tokens         int32 [2, L]       random sequences positions      int32 [M]          where the
  logits were kept logits         float32 [2, M, V]  next-token logits of `tokens` at `positions`
  contexts       int32 [P, C]       scored pairs, padded on the right with -1 continuations  int32
  [P, T]       padded on the right with -1 logprobs       float64 [P]        log-probability of
  continuation given context, summed over its tokens is_greedy      bool [P]           every
  continuation token was the most likely one prompts        int32 [R, C]       padded on the right
  with -1 generations    int32 [R, T]       greedy continuation of each prompt; nothing stops early
"""

import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import golden_models

LENGTH = 96
NEW_TOKENS = 24
# A margin at which no rounding can turn the choice of a greedy step.
MARGIN = 1e-3


def ragged(rows: list[list[int]]) -> np.ndarray:
    """Rows padded on the right with -1."""
    out = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def next_logits(model, ids: list[int]) -> torch.Tensor:
    """float32 [len(ids), V]."""
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0].float()


def generate(model, prompt: list[int]) -> list[int]:
    """Greedy, recomputed from scratch at every step."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        top = next_logits(model, ids)[-1].topk(2)
        if top.values[0] - top.values[1] < MARGIN:
            raise SystemExit("two tokens are nearly equally likely; change the seed of the prompts")
        ids.append(int(top.indices[0]))
    return ids[len(prompt) :]


def golden(name: str, directory: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of one case."""
    golden_models.write_checkpoint(name, directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()
    vocab = golden_models.CASES[name]["vocab_size"]
    random = np.random.RandomState(7)
    tokens = random.randint(0, vocab, (2, LENGTH)).astype(np.int32)
    positions = np.array([0, 1, 2, 3, 7, 15, 30, 31, 32, 33, 47, 63, 64, 80, LENGTH - 1], np.int32)
    logits = np.stack([next_logits(model, row.tolist()).numpy()[positions] for row in tokens])
    prompts = [random.randint(0, vocab, n).tolist() for n in (1, 5, 17, 40)]
    generations = [generate(model, prompt) for prompt in prompts]
    pairs = [
        (random.randint(0, vocab, c).tolist(), random.randint(0, vocab, t).tolist())
        for c, t in ((1, 1), (9, 4), (33, 12), (60, 2))
    ]
    pairs += [(prompts[1], generations[1][:6]), (prompts[3], [*generations[3][:3], 0])]
    logprobs, greedy = [], []
    for context, continuation in pairs:
        step = (
            next_logits(model, context + continuation)[len(context) - 1 : -1]
            .double()
            .log_softmax(-1)
        )
        chosen = torch.tensor(continuation)
        logprobs.append(float(step.gather(1, chosen[:, None]).sum()))
        greedy.append(bool((step.argmax(-1) == chosen).all()))
    print(f"{name}: logits up to {np.abs(logits).max():.2f}, logprobs {np.round(logprobs, 2)}")
    return {
        "tokens": tokens,
        "positions": positions,
        "logits": logits,
        "contexts": ragged([context for context, _ in pairs]),
        "continuations": ragged([continuation for _, continuation in pairs]),
        "logprobs": np.array(logprobs),
        "is_greedy": np.array(greedy),
        "prompts": ragged(prompts),
        "generations": np.array(generations, np.int32),
    }


def main() -> None:
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    torch.set_grad_enabled(False)
    folder = pathlib.Path(__file__).resolve().parent / "golden"
    folder.mkdir(exist_ok=True)
    for name in golden_models.CASES:
        with tempfile.TemporaryDirectory() as directory:
            np.savez_compressed(folder / f"{name}.npz", **golden(name, pathlib.Path(directory)))


if __name__ == "__main__":
    main()
