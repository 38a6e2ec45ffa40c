"""The record of a run, and what is collected for it."""

import gzip
import json
from pathlib import Path

import pytest

from loadtest.traffic.recorder import Collector, Recorder
from loadtest.traffic.run import Replicas, Sample, Writer, read
from tests.traffic.runs import ABOUT, run, scaled, write


def test_what_was_written_is_read_in_the_order_of_arrival(tmp_path: Path) -> None:
    asked = [("rag", 2.0004, 10.126, None), ("autocomplete", 1.0, 5.0, "status: 503"), ("rag", 1.5, 7.0, None)]
    found = run(tmp_path, asked, scaled((1, 1), (1, 2)))
    assert found.about["shape"] == "soak" and found.whole
    requests = found.requests
    assert requests.kind.tolist() == ["autocomplete", "rag", "rag"]
    assert requests.at_s.tolist() == [1.0, 1.5, 2.0] and requests.latency_ms.tolist() == [5.0, 7.0, 10.13]
    assert requests.fault.tolist() == ["status: 503", "", ""] and requests.right.tolist() == [False, True, True]
    assert requests.inputs.tolist() == [2, 2, 2] and requests.characters.tolist() == [20, 20, 20]
    assert requests.tokens.tolist() == [10, 10, 10]
    assert found.samples == [Sample(1.0, 4, {"Model": Replicas(1, 1)}), Sample(2.0, 4, {"Model": Replicas(1, 2)})]
    assert found.elapsed_s == pytest.approx(2.01013)


def test_the_record_is_json_lines_that_anything_can_read(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl.gz", [("rag", 1.0, 7.0, "norm: x")], [(1.0, 4, None)])
    lines = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    assert [line["line"] for line in lines] == ["run", "requests", "sample", "end"]
    assert lines[1] == {
        "line": "requests", "kind": "rag", "at_s": [1.0], "inputs": [2], "characters": [20], "tokens": [10],
        "latency_ms": [7.0], "faults": {"0": "norm: x"},
    }  # fmt: skip
    assert lines[2] == {"line": "sample", "at_s": 1.0, "users": 4, "deployments": None}


def test_a_run_without_an_answer_can_be_read(tmp_path: Path) -> None:
    found = run(tmp_path, [])
    assert len(found.requests) == 0 and found.elapsed_s == 0


def test_of_a_run_that_was_killed_the_flushed_lines_are_there(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "a.jsonl.gz", ABOUT)
    writer.sample(1.0, 3, None)
    writer.flush()
    found = read(writer.file)
    assert [sample.users for sample in found.samples] == [3] and not found.whole
    writer.close()


@pytest.mark.parametrize(
    "content",
    [b"not gzip", gzip.compress(b"not json\n"), gzip.compress(b'{"line":"sample"}\n')],
    ids=["no gzip", "no json", "no run"],  # compressed, they differ from one second to the next
)
def test_what_is_no_record_is_refused_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is not the record of a run"):
        read(file)


def test_a_long_run_takes_few_bytes_a_request(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "a.jsonl.gz", ABOUT)
    recorder = Recorder(writer, started=1000.0)
    for second in range(100):
        recorder.add(collected(second, 200))
    writer.close()
    assert writer.file.stat().st_size < 12 * 100 * 200


def collected(second: int, number: int, fault: Exception | None = None) -> dict[str, dict[str, object]]:
    collector = Collector()
    for each in range(number):
        collector.on_request(
            name="rag",
            response_time=10 + each * 37 % 91 + second / 7,
            start_time=1000.0 + second + each / number,
            context={"inputs": 5, "characters": 100 + each * 13 % 57, "tokens": 30 + each * 5 % 17},
            exception=fault,
        )
    return collector.take()


def test_collected_requests_are_taken_once() -> None:
    collector = Collector()
    size = {"inputs": 1, "characters": 2, "tokens": 3}
    collector.on_request("rag", 5.0, 1000.5, size, None)
    assert collector.take()["rag"]["at_s"] == [1000.5]
    assert collector.take() == {}


def test_the_line_says_how_it_went_since_the_last_one(tmp_path: Path) -> None:
    recorder = Recorder(Writer(tmp_path / "a.jsonl.gz", ABOUT), started=1000.0)
    recorder.add(collected(0, 50))
    recorder.add(collected(1, 10, ValueError("norm: x")))
    recorder.sample(1005.0, 20, {"Ingress": Replicas(1, 1), "Model": Replicas(1, 3)})
    first = " ".join(recorder.line(1005.0, 20).split())
    assert first == "5 s 20 users 12.0 req/s p99 97 ms 10 failed Ingress 1 Model 1->3"
    recorder.sample(1010.0, 20, None)
    second = " ".join(recorder.line(1010.0, 20).split())
    assert second == "10 s 20 users 0.0 req/s p99 - ms 10 failed replicas unknown"


def test_a_clock_that_is_behind_makes_no_request_before_the_start(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "a.jsonl.gz", ABOUT)
    Recorder(writer, started=1000.5).add(collected(0, 4))
    writer.close()
    assert read(writer.file).requests.at_s.tolist() == [0.0, 0.0, 0.0, 0.25]
