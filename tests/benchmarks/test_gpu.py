"""The GPU's benchmark runs, on a CPU: what it measures is not judged here."""

import json

from benchmarks import gpu


def test_gpu(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--quick", "--workloads", "tiny", "--out", str(out)]) == 0
    ways = json.loads(out.read_text())["workloads"]["tiny"]["ways"]
    assert set(ways) == {gpu.LOOP, gpu.OURS, gpu.READ}
    assert ways[gpu.LOOP]["vs_loop"]["median"] == 1.0
    assert all(way["peak"] > 0 and way["waits"] is None for way in ways.values())
    assert "weight on the device" in capsys.readouterr().out
