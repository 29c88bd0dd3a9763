"""Measures a bundle on a device, and compares two measurements.

```python
from pathlib import Path

from pocketvlm.device_bench.controller import bench_bundle
from pocketvlm.device_bench.workload import load_workload

result = bench_bundle(Path("out/bundle"), load_workload("vlm"))
print(result.latency["onnx"].figure("ttft_user_ms").median)
```

`docs/benchmarking.md` defines every figure.
"""
