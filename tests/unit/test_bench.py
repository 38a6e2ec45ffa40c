"""The benchmark's decisions: what is asked, what a run's numbers say. Nothing is served or measured here."""

import doctest
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from ray.serve.schema import ServeDeploySchema

from loadtest import meter, report, summary, workload, wrk
from loadtest.summary import Stat
from loadtest.systems import gpu_config

CELLS = {cell.name: cell for cell in workload.CELLS}


@pytest.mark.parametrize("module", ["summary", "report", "meter", "share"])
def test_the_examples_in_the_docstrings_hold(module: str) -> None:
    ran = doctest.testmod(importlib.import_module(f"loadtest.{module}"))
    assert ran.attempted > 0 and ran.failed == 0


def test_the_same_texts_are_asked_every_time_and_at_every_number_of_connections() -> None:
    texts = workload.requests(CELLS["9w-1c"])
    assert texts == workload.requests(CELLS["9w-1c"]) == workload.requests(CELLS["9w-256c"])
    assert len(texts) == workload.MOST_BODIES
    assert all(len(row) == 1 and len(row[0].split()) == 9 for row in texts)
    assert len({row[0] for row in texts}) > 0.99 * len(texts)


def test_mixed_lists_spread_over_the_whole_range_of_lengths() -> None:
    lengths = [len(text.split()) for texts in workload.requests(CELLS["mixed-2c"]) for text in texts]
    assert min(lengths) == 4 and 480 < max(lengths) < 500
    # Log-uniform: as many below the geometric middle of the range as above it.
    below = sum(length < (4 * 500) ** 0.5 for length in lengths) / len(lengths)
    assert 0.47 < below < 0.53


def test_bodies_are_written_once_a_shape_and_encoding(tmp_path: Path) -> None:
    file = workload.write(CELLS["9w-64c-float"], tmp_path)
    assert file == workload.write(CELLS["9w-64c-float"], tmp_path) != workload.write(CELLS["9w-1c"], tmp_path)
    first = json.loads(file.read_text().splitlines()[0])
    assert first == {
        "model": workload.MODEL,
        "input": workload.requests(CELLS["9w-1c"])[0][0],
        "encoding_format": "float",
    }
    assert json.loads(workload.body(["a", "b"], "base64"))["input"] == ["a", "b"]


def test_on_a_gpu_the_service_has_one_model_there_and_its_other_replicas_from_the_start() -> None:
    found = ServeDeploySchema.model_validate(gpu_config(cores=16)).applications[0]
    assert found.args["models"][0]["batch_tokens"] == 65_536
    deployments = {each.name: each for each in found.deployments}
    counts = {name: each.num_replicas for name, each in deployments.items()}
    assert counts == {"Ingress": 8, "Tokenizer-Ivysaur": 4, "Model-Ivysaur": 1}
    assert deployments["Model-Ivysaur"].ray_actor_options.num_gpus == 1
    assert all(each["num_replicas"] == 1 for each in gpu_config(cores=1)["applications"][0]["deployments"])


def load(**changes: Any) -> wrk.Load:
    usual = {"answers": 100, "seconds": 10.0, "mean_ms": 50.0, "p50_ms": 50.0, "p99_ms": 60.0, "refused": 0}
    return wrk.Load(**(usual | {"broken": 0, "cpu": 0.1} | changes))


def test_single_texts_are_counted_and_refused_ones_are_not() -> None:
    assert wrk.rate(load(), CELLS["9w-8c"]) == 10.0
    assert wrk.rate(load(refused=40), CELLS["9w-8c"]) == 6.0
    assert wrk.rate(load(answers=0), CELLS["9w-8c"]) == wrk.rate(load(refused=100), CELLS["9w-8c"]) == 0.0


def test_of_long_lists_what_was_under_way_at_the_end_counts_too() -> None:
    longest, lists = CELLS["2048x16w-1c"], CELLS["32x64w-4c"]
    # One answer within 20 s, the second was at 7 of its 13 seconds: not 0.05 a second, but nearly one in 13 seconds.
    assert wrk.rate(load(answers=1, seconds=20.0, mean_ms=13_000.0), longest) == 0.075
    assert wrk.rate(load(answers=2, seconds=20.0, mean_ms=9_000.0), longest) == pytest.approx(1 / 9)
    assert wrk.rate(load(answers=2, seconds=20.0, mean_ms=9_000.0, refused=1), longest) == pytest.approx(1 / 18)
    # The first of four was served alone and fast: that says little about the other three.
    assert wrk.rate(load(answers=1, seconds=3.0, mean_ms=850.0), lists) == 1.0
    # A mean that one stall pulled up says less than the count does.
    assert wrk.rate(load(answers=30, seconds=10.0, mean_ms=2000.0), lists) == 3.0


@pytest.mark.parametrize(
    ("title", "role"),
    [
        ("ray::ServeReplica:embeddings:Model-Ivysaur", "model"),
        ("ray::ServeReplica:embeddings:Tokenizer-Ivysaur.tokenize", "tokenizer"),
        ("ray::ServeReplica:plain:Ingress", "ingress"),
        ("ray::ServeController.listen_for_change", "controller"),
        ("ray::ProxyActor", "proxy"),
        ("ray::HAProxyManager.ready", "proxy manager"),
        ("/venv/bin/haproxy -db -f /run/haproxy.cfg", "haproxy"),
        ("/venv/bin/python -u /venv/ray/dashboard/dashboard.py --host=127.0.0.1", "dashboard and agents"),
        ("ray::DashboardAgent", "dashboard and agents"),
        ("ray::RuntimeEnvAgent", "dashboard and agents"),
        ("/venv/ray/core/src/ray/gcs/gcs_server --log_dir=/logs", "other"),
        ("/venv/ray/raylet/raylet --dashboard_agent_command=/venv/ray/dashboard/agent.py", "other"),
        ("/venv/bin/python -m serve_app serve_config.yaml", "other"),
    ],
)
def test_processes_are_told_apart_by_their_titles(title: str, role: str) -> None:
    assert meter.ray_role(title) == role


def test_throughput_falls_where_it_lies_under_an_earlier_peak() -> None:
    assert summary.deepest_fall({1: 1.0, 8: 2.0, 32: 3.0}) == (0, 0.0)
    assert summary.deepest_fall({256: 75.0, 1: 50.0, 8: 100.0, 32: 90.0}) == (256, 0.25)
    assert summary.deepest_fall({}) == (0, 0.0)


def test_ratios_leave_out_what_was_not_measured() -> None:
    ours = {"a": 6.0, "b": 4.0, "c": 0.0, "d": 1.0}
    assert summary.ratio_to_best(ours, [{"a": 3.0, "b": 8.0, "c": 1.0}, {"b": 1.0, "d": 0.0}]) == {"a": 2.0, "b": 0.5}
    assert summary.ratio_to_best(ours, []) == {}
    assert summary.lowest({}) is None


def results(**rates: dict[str, list[float]]) -> report.Results:
    """Results with a rate a round for each system and cell; p50 is 1000 / rate, p99 the double, all else constant."""
    run = {
        "kind": "run", "date": "2026-01-02 03:04", "command": "bench", "rounds": 2, "versions": {"ray": "2"},
        "machine": {"cpu": "a processor", "cores": 2, "memory_gb": 8.0, "kernel": "6"},
        "cells": [
            {"name": cell.name, "words": cell.words, "rows": cell.rows, "connections": cell.connections,
             "encoding": cell.encoding, "seconds": cell.seconds, "tokens": 11.0}
            for cell in workload.CELLS
        ],
    }  # fmt: skip
    lines = [run]
    for name, cells in rates.items():
        system = name.replace("_", "-")
        lines.append(
            {
                "kind": "start",
                "round": 0,
                "system": system,
                "seconds": 3.0,
                "cosine": 0.9999,
                "versions": {"torch": "2"},
            }
        )
        for cell, values in cells.items():
            lines += [
                {"kind": "measure", "round": round_, "system": system, "cell": cell, "requests_per_s": value,
                 "texts_per_s": value, "tokens_per_s": 11 * value, "p50_ms": 1000 / value, "p99_ms": 2000 / value,
                 "errors": 1, "cpu_ms": {"model": 4.0, "ingress": 1.0}, "memory_mb": 900.0, "wrk_cpu": 0.05,
                 "foreign_cpu": 0.9 if system == "plain-serve" else 0.01}
                for round_, value in enumerate(values)
            ]  # fmt: skip
    return report.Results([json.dumps(line) for line in lines])


def full() -> report.Results:
    return results(
        ours={"9w-1c": [100.0], "9w-32c": [800.0, 1000.0, 900.0], "9w-64c": [720.0], "32x64w-4c": [8.0]},
        infinity_onnx={"9w-1c": [80.0], "9w-32c": [300.0], "32x64w-4c": [10.0]},
        infinity_torch={"9w-1c": [40.0], "9w-32c": [450.0], "32x64w-4c": [4.0]},
        plain_serve={"9w-32c": [200.0]},
        raw_engine={"9w-64c": [1440.0]},
    )


def test_the_summary_says_what_the_numbers_say() -> None:
    said = "\n".join(report.summary(full()))
    # 100 / 80, 900 / 450 and 8 / 10 are 1.25, 2 and 0.8.
    assert "geometric mean of 3 cells: 1.26x" in said
    assert "The lowest of them: 32x64w-4c with 0.80x" in said
    assert "p99 is over the lower one of Infinity's: 32x64w-4c (250 over 200 ms)" in said
    assert "p50 of 9 words at 1 connection, ours over the lower one of Infinity's: 0.80x" in said
    assert "over plain-serve, 9 words at 32 connections: 4.50x" in said
    assert "raw engine's tokens/s, 9 words at 64 connections: 50%" in said
    assert "raw engine's tokens/s, mixed lists: not measured" in said
    assert "of 9w over growing connections: 20.0% under its peak before, at 64 connections" in said
    assert "Our errors in all rounds: 6" in said
    assert "busy: 1 of 14" in said


def test_a_run_of_one_system_alone_can_be_reported() -> None:
    only = results(ours={"9w-1c": [100.0]})
    assert "geometric mean of 0 cells: not measured" in "\n".join(report.summary(only))
    assert "| 9w-1c | 100 | - |" in report.markdown(only, "plot.png")


def test_the_report_has_a_table_for_each_cell_that_was_measured() -> None:
    text = report.markdown(full(), "plot.png")
    assert "### 9w-32c: one text of 9 words, 32 connections, base64" in text
    assert "| ours | 900 (800..1,000) |" in text and "| 3 | 5: model 4, ingress 1 | 900 | 5% |" in text
    assert "### mixed-2c" not in text
    assert "| 9w-32c | 900 | 300 | 450 | 200 | - | 2.00x |" in text


def test_a_spread_is_shown_where_there_is_one() -> None:
    assert report.spread(Stat(2.0, 1.0, 3.0)) == "2 (1..3)"
    assert report.spread(Stat(2.0, 2.0, 2.0)) == "2" and report.spread(None) == "-"


def test_the_plot_is_drawn_of_whatever_was_measured(tmp_path: Path) -> None:
    from loadtest import plot

    for number, found in enumerate((full(), results(ours={"2048x16w-1c": [1.0]}))):
        plot.draw(found, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")
