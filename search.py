"""Ranks one folder of images by likeness to another, with a trained network.

The use that a practitioner has for a checkpoint: no identities, no lists, no protocol.
`test.py --query-dir A --gallery-dir B` comes here.
"""

from __future__ import annotations

import argparse
import csv
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_loader import EvalLoader, load_images
from data_manager import ImageList, folder_images
from engine.evaluate import distances, extract_features
from model import load_network, trained_size
from utils import make_writable_dir, resolve_device, write_atomic, write_json

log = logging.getLogger(__name__)

TOP = 20  # gallery images a query in the files
DRAWN = 10  # and in the picture
MODALITIES = {"v2i": ("visible", "infrared"), "i2v": ("infrared", "visible")}


def search_folders(args: argparse.Namespace) -> Path:
    """Embeds both folders, ranks, and writes ``ranks.csv``, ``ranks.json``, ``ranked_lists.png``.

    Args:
        args: The flags of ``test.py``, resolved.

    Returns:
        The folder written to.

    Raises:
        ValueError: A folder or the checkpoint is not named, missing or of no use, or an image can't
            be decoded.
    """
    from figures.image_grids import ranked_lists  # drawing takes its time to import

    if not (args.query_dir and args.gallery_dir and args.resume):
        raise ValueError(
            "one's own images take three flags: --query-dir FOLDER --gallery-dir FOLDER "
            "--resume CHECKPOINT"
        )
    if args.save_features or "{trial}" in args.resume:
        raise ValueError("--query-dir goes with neither --save-features nor several checkpoints")
    modalities = MODALITIES[args.direction]
    lists = [
        folder_images(args.query_dir, args.query_modality or modalities[0]),
        folder_images(args.gallery_dir, args.gallery_modality or modalities[1]),
    ]
    device = resolve_device(args.gpu)
    net, info = load_network(args.resume, gem_p=args.gem_p, memory_variant=args.memory_variant)
    trained = trained_size(info)
    size = args.img_h or trained[0], args.img_w or trained[1]
    net.check_image_height(size[0])
    name = f"search_{args.query_dir.resolve().name}_{args.gallery_dir.resolve().name}"
    output = make_writable_dir(args.output_dir or Path(args.resume).parent / name)
    net = net.to(device, memory_format=torch.channels_last)
    feat = args.test_feat or net.test_feats()[0]
    pixels, features = [], []
    for images in lists:
        pixels.append(
            load_images(
                images,
                height=size[0],
                width=size[1],
                workers=args.workers,
                progress=not args.quiet,
            )
        )
        batches = EvalLoader(pixels[-1], batch_size=args.test_batch, device=device)
        embedded = extract_features(
            net,
            batches,
            modality=images.modality,
            test_feats=(feat,),
            amp=args.amp,
            progress=not args.quiet,
        )
        features.append(embedded[feat])
    distmat = distances(*features, args.re_rank)
    about = {
        "checkpoint": str(args.resume),
        "query": str(args.query_dir),
        "gallery": str(args.gallery_dir),
        "query_modality": lists[0].modality,
        "gallery_modality": lists[1].modality,
        "test_feat": feat,
        "re_rank": args.re_rank,
    }
    write_ranks(output, lists[0], lists[1], distmat, about)
    ranked = "" if args.re_rank == "no" else f"; re-ranked: {args.re_rank}"
    ranked_lists(
        output / "ranked_lists.png",
        query_images=pixels[0],
        gallery_images=pixels[1],
        distmat=distmat,
        query_names=lists[0].paths,
        top=DRAWN,
        title=f"{args.query_dir} ({lists[0].modality}) among {args.gallery_dir} "
        f"({lists[1].modality}){ranked}",
    )
    log.info("wrote ranks.csv, ranks.json and ranked_lists.png into %s", output)
    return output


def write_ranks(
    folder: Path, query: ImageList, gallery: ImageList, distmat: np.ndarray, about: dict[str, Any]
) -> None:
    """Writes each query's nearest `TOP` gallery images, nearest first, as CSV and as JSON.

    Args:
        folder: Where to.
        query: Q images.
        gallery: G images.
        distmat: (Q, G), smaller is closer; ties keep gallery order. A rank's ``score`` is minus it:
            without re-ranking the cosine similarity.
        about: What the JSON says beside the ranks.
    """
    nearest = np.argsort(distmat, axis=1, kind="stable")[:, :TOP]
    ranks = [
        {
            "query": name,
            "gallery": [
                {"rank": place, "image": gallery.paths[g], "score": round(float(-row[g]), 6)}
                for place, g in enumerate(order.tolist(), start=1)
            ],
        }
        for name, order, row in zip(query.paths, nearest, distmat, strict=True)
    ]
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(("query", "rank", "gallery", "score"))
    table.writerows(
        (entry["query"], answer["rank"], answer["image"], answer["score"])
        for entry in ranks
        for answer in entry["gallery"]
    )
    content = text.getvalue().encode("utf-8", "surrogateescape")
    write_atomic(folder / "ranks.csv", lambda stream: stream.write(content))
    write_json(folder / "ranks.json", {**about, "ranks": ranks})
