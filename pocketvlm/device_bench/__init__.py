"""Measures a bundle on a device, and compares two measurements.

```python
from pathlib import Path

from pocketvlm.device_bench.arm import pair_all
from pocketvlm.device_bench.controller.bench import bench_bundles
from pocketvlm.device_bench.workload import load_workload

pairs = pair_all([Path("out/float-baseline"), Path("out/bundle")])
(result,) = bench_bundles(pairs, [load_workload("vlm")])
print(result.arms["bundle"].ratios["ttft_user_ms"])
```

`docs/benchmarking.md` defines every figure.
"""
