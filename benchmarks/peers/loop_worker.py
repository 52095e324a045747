"""Does a job with a bare PyTorch loop and all logits: python -m benchmarks.peers.loop_worker JOB."""

import json
import sys
import time

BEGAN = time.perf_counter()

import torch  # noqa: E402

from benchmarks.peers.clock import Clock  # noqa: E402
from benchmarks.peers.rewarm_worker import parts  # noqa: E402
from rewarm.lightning_modules.policy import build_model  # noqa: E402


def main() -> None:
    """Do the job and print what came out as JSON; the batches are those of rewarm."""
    with open(sys.argv[1]) as file:
        job = json.load(file)
    torch.manual_seed(0)
    _, data = parts(job)
    data.prepare_data()
    data.setup("fit")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(f"{job['folder']}/model", job["ours"].get("attention")).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["lr"], weight_decay=0.0, fused=True)
    clock = Clock(BEGAN)
    batches = iter(data.train_dataloader())
    for _ in range(job["steps"] + 2):
        batch = next(batches)
        ids, places, targets = (batch[k].to(device) for k in ("input_ids", "position_ids", "targets"))
        clock.mark("data")
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=ids, position_ids=places, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        del logits
        clock.mark("fwd+bwd")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.mark("optimizer")
        clock.losses.append(loss.detach())
        clock.count(ids.numel(), (batch["sequence_ids"] >= 0).sum(), (targets != -100).sum())
        clock.end_step()
    print(json.dumps(clock.result()))


if __name__ == "__main__":
    main()
