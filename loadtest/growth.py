"""`python -m loadtest.growth`: throughput over model replicas whose engine sleeps, and what the other stages can feed.

The engine takes time and no CPU (serve_app/engines/sleep.py), so that a small machine can carry many replicas and what
limits them is the ingress. From the costs that are measured on the way follows how many processes of each kind an
engine of a given speed needs.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from loadtest import wrk
from loadtest.meter import Meter
from loadtest.systems import ROOT, systems
from loadtest.weights import TOKENIZER, tokens
from loadtest.workload import CELLS, Cell, requests, write

REPLICAS = (1, 2, 4, 8)
CONNECTIONS_A_REPLICA = 24
SECONDS = 8.0
# Speeds for which the need is told, in tokens/s of one engine: a modern CPU, and what GPUs of two sizes could reach.
ENGINES = (25_000, 1_000_000, 10_000_000)


def config(replicas: int) -> dict[str, Any]:
    """serve_config.yaml with so many sleeping models, which need no core."""
    written: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    application = written["applications"][0]
    application["args"]["models"][0]["engine"] = "sleep"
    model = next(each for each in application["deployments"] if each["name"].startswith("Model-"))
    del model["autoscaling_config"]
    model |= {"num_replicas": replicas, "ray_actor_options": {"num_cpus": 0}}
    return written


def tokenizer_rate(cell: Cell, seconds: float = 2.0) -> float:
    """Tokens/s of one tokenizer, on one core, of long texts of words that it has met before."""
    texts = [request[0] for request in requests(cell)][:8]
    made, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        made += TOKENIZER.tokenize(texts).packed.tokens
    return made / spent


def main() -> None:
    """Run and print Markdown tables."""
    argparse.ArgumentParser(prog="python -m loadtest.growth").parse_args()
    wrk.require()
    print("`python -m loadtest.growth`\n")
    print("| model replicas | requests/s | of linear | p50 ms | p99 ms | CPU ms a request |\n|---|---|---|---|---|---|")
    alone = ingress_ms = 0.0
    with tempfile.TemporaryDirectory(prefix="growth-") as scratch:
        folder = Path(scratch)
        for replicas in REPLICAS:
            file = folder / f"{replicas}.yaml"
            file.write_text(yaml.safe_dump(config(replicas)))
            ours = systems(folder)["ours"]
            system = replace(ours, command=(*ours.command[:-1], str(file)))
            cell = replace(CELLS[0], connections=CONNECTIONS_A_REPLICA * replicas)
            with system.running(folder) as root:
                wrk.run(system.url, write(cell, folder), cell.connections, 4)  # until all replicas are known
                with Meter(root, system.role) as meter:
                    load = wrk.run(system.url, write(cell, folder), cell.connections, SECONDS)
            assert load.refused + load.broken == 0, f"{load.refused} refused, {load.broken} broken"
            rate = load.answers / load.seconds
            alone = alone or rate
            spent = {role: used / load.answers * 1e3 for role, used in meter.cpu_s.items()}
            ingress_ms = spent["ingress"]
            by_cost = sorted(spent.items(), key=lambda item: -item[1])
            shown = ", ".join(f"{role} {ms:.2f}" for role, ms in by_cost if ms >= 0.05)
            share = rate / alone / replicas
            latency = f"{load.p50_ms:.0f} | {load.p99_ms:.0f}"
            print(f"| {replicas} | {rate:.0f} | {share:.2f} | {latency} | {shown} |", flush=True)
    made = tokenizer_rate(next(cell for cell in CELLS if cell.shape == "510w"))
    passed = 1e3 / ingress_ms
    print(f"\nOne ingress passes on {passed:,.0f} short queries a second; one tokenizer makes {made:,.0f} tokens/s.\n")
    print(
        "| one engine of | ingress replicas, for 9-word queries | tokenizer replicas, for long texts |\n|---|---|---|"
    )
    for speed in ENGINES:
        queries = speed / tokens(CELLS[0])
        print(f"| {speed:,} tokens/s | {queries / passed:.1f} | {speed / made:.1f} |")


if __name__ == "__main__":
    main()
