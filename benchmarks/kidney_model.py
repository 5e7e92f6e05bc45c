"""Train the kidney model that ships with the package.

    python benchmarks/kidney_model.py DATA/visium_hd_kidney --out src/pixnet/models/weights/kidney.safetensors

It learns all genes from the 55 µm spots of the part of the section that is there; a block in space chooses the number of passes and
gives the evidence. `benchmarks/quality.py kidney --methods "64 programs"` tests the same recipe on a part that training never sees.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import pixnet as px


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--out", type=Path, default=Path("kidney.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sdata = px.datasets.kidney(args.data, shapes=["spots"])
    start = time.perf_counter()
    model = px.tl.train({"kidney": sdata}, total_key="total_counts", seed=args.seed)
    model.provenance["tissue"] = "human kidney, FFPE"
    model.save(args.out, dtype="float16", overwrite=True)
    evidence = model.evidence.frame(model.genes)
    print(
        json.dumps(
            {
                "train_s": round(time.perf_counter() - start),
                "file_mb": round(args.out.stat().st_size / 1e6, 2),
                "genes": len(model.genes),
                "trusted": int((evidence["validation_pearson_low"] > 0).sum()),
                "median_r": round(float(evidence["validation_pearson"].median()), 3),
                "validation": model.history[-1],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
