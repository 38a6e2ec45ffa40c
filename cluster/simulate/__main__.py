"""`python -m cluster.simulate`: how the service would scale, without the machines.

    run       one load through serve_config.yaml's policy
    compare   the same beside Serve's default policy, with the same bounds
    sweep     cost against latency over a range of target_drain_s
    measure   one load against every application of a running service, and the first one's simulated: how far off?
    capacity  replicas that 1k, 10k, 100k and 1M short queries a second need

The policy is serve_app's own, with the parameters, bounds and delays of serve_config.yaml unless options say otherwise;
but up to 20 replicas, so that it is the policy that is seen and not its bound.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ray.serve.config import AutoscalingConfig

from cluster.serves_default import serves_default
from cluster.simulate.arrivals import Arrivals, arrivals, recorded, shapes
from cluster.simulate.capacity import Rates, replicas
from cluster.simulate.plot import draw, draw_sweep
from cluster.simulate.real import drive
from cluster.simulate.replay import Run, configured, replay
from cluster.simulate.service import Costs
from serve_app.autoscale import DrainTime

CONFIG = Path(__file__).parents[2] / "serve_config.yaml"
# What a batch costs: the engine that only sleeps; two cores of an EPYC, as measured; and an H100, of whose tokens the
# price is that of the process that feeds it.
ENGINES = {
    "sleep": Costs(launch_s=0.005, token_s=0.001, batch_tokens=256, start_s=6.0),
    "cpu": Costs(
        launch_s=0.0012, token_s=2 / Rates.cpu_tokens, batch_tokens=1280, lanes=2, lane_tokens=128, start_s=15.0
    ),
    "gpu": Costs(launch_s=0.0007, token_s=1 / Rates.gpu_tokens, batch_tokens=65_536, start_s=60.0),
}
DRAINS_S = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0)
UTILIZATIONS = (0.5, 0.7, 0.9)
QUERIES_PER_S = (1_000, 10_000, 100_000, 1_000_000)
# Requests that are enough to tell the latency at a steady load.
SAMPLE_REQUESTS = 200_000


def main() -> None:
    """Run what the command line asks for."""
    options = _options()
    costs = ENGINES[options.engine]
    given = {"start_s": options.start_s, "ingresses": options.ingresses, "batch_tokens": options.batch_tokens}
    costs = replace(costs, **{name: value for name, value in given.items() if value is not None})
    kwargs, scaling = configured(options.config, min_replicas=options.min_replicas, max_replicas=options.max_replicas)
    if options.target_drain_s is not None:
        kwargs["target_drain_s"] = options.target_drain_s
    if options.what == "capacity":
        _capacity(options.tokens, kwargs)
        return
    load, said = _load(options, costs)
    started = time.perf_counter()
    if options.what == "sweep":
        lines = _sweep(load, costs, scaling, options.seed)
        draw_sweep(lines, f"{said}, {options.engine}", options.out)
        runs = [run for line in lines.values() for run in line]
    elif options.what == "measure":
        runs = _measure(options, load, costs, kwargs, scaling)
        draw(runs, f"{said}, {options.engine}", options.out)
    else:
        runs = [replay("serve_config.yaml", load, costs, DrainTime(**kwargs), scaling, options.seed)]
        if options.what == "compare":
            runs += _defaults(load, costs, scaling, options.seed)
        draw(runs, f"{said}, {options.engine}", options.out)
    print(f"{said}: {len(load):,} requests, {load.tokens.sum():,} tokens, {time.perf_counter() - started:.1f} s\n")
    _table(runs)
    print(f"\nwrote {options.out}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "compare", "sweep", "measure", "capacity"))
    parser.add_argument("--shape", choices=sorted(shapes(0, 0, 1)), default="step")
    parser.add_argument("--recorded", type=Path, help="JSON lines with arrival_s and tokens, instead of a shape")
    parser.add_argument("--base", type=float, default=0.5, help="lowest load, in replicas that are always busy")
    parser.add_argument("--peak", type=float, default=4.0, help="highest load, in the same")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--tokens", type=float, default=11.0, help="median of a request's tokens")
    parser.add_argument("--spread", type=float, default=0.0, help="deviation of their logarithm; 1.5 is a heavy tail")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=sorted(ENGINES), default="cpu")
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--start-s", type=float, help="from a decision until a replica takes calls")
    parser.add_argument("--ingresses", type=int)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--target-drain-s", type=float)
    parser.add_argument("--min-replicas", type=int)
    parser.add_argument("--max-replicas", type=int, default=20)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service that is measured")
    parser.add_argument("--dashboard", default="http://127.0.0.1:8265", help="of Ray, for its replicas")
    parser.add_argument("--out", type=Path, default=Path("simulated.png"), help="the picture: .png or .svg")
    return parser.parse_args()


def _load(options: argparse.Namespace, costs: Costs) -> tuple[Arrivals, str]:
    if options.recorded:
        return recorded(options.recorded), str(options.recorded)
    a_replica = costs.rate / options.tokens
    shape = shapes(options.base * a_replica, options.peak * a_replica, options.seconds)[options.shape]
    return arrivals(shape, options.seconds, options.tokens, options.spread, options.seed), options.shape


def _defaults(load: Arrivals, costs: Costs, scaling: AutoscalingConfig, seed: int) -> list[Run]:
    """Serve's default policy with its own delays, and with ours; a replica's full batch in progress is its target."""
    ongoing = max(1.0, costs.batch_tokens / float(load.tokens.mean()))
    least, most = scaling.min_replicas, scaling.max_replicas
    ours = scaling.model_copy(update={"target_ongoing_requests": ongoing})
    theirs = AutoscalingConfig(min_replicas=least, max_replicas=most, target_ongoing_requests=ongoing)
    return [
        replay("Serve's default", load, costs, serves_default, theirs, seed),
        replay("Serve's default, same delays", load, costs, serves_default, ours, seed),
    ]


def _measure(
    options: argparse.Namespace, load: Arrivals, costs: Costs, kwargs: dict[str, float], scaling: AutoscalingConfig
) -> list[Run]:
    outcomes = asyncio.run(drive(options.url, options.dashboard, load, costs.rate))
    for outcome in outcomes:
        starts = [f"{start_s:.1f}" for start_s in sorted(outcome.start_s)]
        print(f"{outcome.run.name}: {len(outcome.failures)} requests failed; starts took {', '.join(starts) or '-'} s")
        if outcome.unseen:
            print(f"  the dashboard did not tell the replicas {len(outcome.unseen)} times, last: {outcome.unseen[-1]}")
        for failure in outcome.failures[:5]:
            print(f"  {failure}")
    measured = outcomes[0]
    if not measured.run.timeline.running:
        raise SystemExit(f"simulate: the dashboard never told the replicas: {measured.unseen[-1]}")
    start_s = statistics.median(measured.start_s) if measured.start_s else costs.start_s
    simulated = replay("simulated", load, replace(costs, start_s=start_s), DrainTime(**kwargs), scaling, options.seed)
    for share in (50, 99):
        off = simulated.percentile_ms(share) / measured.run.percentile_ms(share) - 1
        print(f"simulated p{share}: {off:+.1%}")
    print(f"simulated replica-seconds: {simulated.replica_s / measured.run.replica_s - 1:+.1%}\n")
    return [*(outcome.run for outcome in outcomes), simulated]


def _sweep(load: Arrivals, costs: Costs, scaling: AutoscalingConfig, seed: int) -> dict[str, Sequence[Run]]:
    return {
        f"target_utilization {share:g}, target_drain_s at the points": [
            replay(f"{drain_s:g}", load, costs, DrainTime(drain_s, share), scaling, seed) for drain_s in DRAINS_S
        ]
        for share in UTILIZATIONS
    }


def _table(runs: Sequence[Run]) -> None:
    print(
        "| run | p50 ms | p99 ms | longest ms | replica-hours | most replicas | turns |\n|---|---|---|---|---|---|---|"
    )
    for run in runs:
        latency = " | ".join(f"{run.percentile_ms(share):,.0f}" for share in (50, 99, 100))
        line = run.timeline
        print(f"| {run.name} | {latency} | {run.replica_s / 3600:.2f} | {max(line.running)} | {line.turns()} |")


def _capacity(tokens: float, kwargs: dict[str, float]) -> None:
    print("| queries/s | ingress | tokenizer | models on CPU | p99 ms | models on GPU | p99 ms |")
    print("|---|---|---|---|---|---|---|")
    for queries in QUERIES_PER_S:
        needed = replicas(queries, tokens, Rates(), kwargs["target_utilization"])
        cells = [f"{queries:,}", f"{needed['ingress']:,}", f"{needed['tokenizer']}"]
        for engine in ("cpu", "gpu"):
            count = needed[f"{engine} model"]
            costs = replace(ENGINES[engine], ingresses=needed["ingress"])
            seconds = min(20.0, SAMPLE_REQUESTS / queries)
            load = arrivals(shapes(queries, 0, seconds)["steady"], seconds, tokens)
            scaling = AutoscalingConfig(min_replicas=count, max_replicas=count)
            run = replay(engine, load, costs, DrainTime(**kwargs), scaling, 0)
            cells += [f"{count:,}", f"{run.percentile_ms(99):.0f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
