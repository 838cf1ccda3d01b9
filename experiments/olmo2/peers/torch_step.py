"""The peer of the throughput benchmark: Hugging Face's OLMo 2 trained with torch, one step at a
time on request.

Runs in the peers' environment (`make peers`), not in ours. `experiments/olmo2/benchmark.py` starts
it with the shape as one JSON argument, then writes one number of steps a line to its standard input
and reads back the seconds of every step."""

import json
import sys
import time

import torch
import transformers


def main() -> None:
    """Serves timing requests until standard input ends."""
    shape = json.loads(sys.argv[1])
    torch.manual_seed(0)
    torch.set_num_threads(shape["threads"])
    config = transformers.Olmo2Config(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["d_model"],
        intermediate_size=shape["d_ff"],
        num_hidden_layers=shape["n_layers"],
        num_attention_heads=shape["n_heads"],
        num_key_value_heads=shape["n_heads"],
        max_position_embeddings=shape["seq_len"],
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = transformers.Olmo2ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
    )
    tokens_BL = torch.randint(2, shape["vocab_size"], (shape["batch_size"], shape["seq_len"]))

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=shape["dtype"] == "bfloat16"):
            loss = model(input_ids=tokens_BL, labels=tokens_BL).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    step()
    ready = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "attention": config._attn_implementation,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"seconds": seconds, "loss": loss}), flush=True)


if __name__ == "__main__":
    main()
