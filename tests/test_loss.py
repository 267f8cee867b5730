import math

import numpy as np
import pytest
import torch
from recipe import GOLDEN

from loss import (
    BatchHardTripletLoss,
    Criterion,
    HeteroCenterTripletLoss,
    WeightedRegularizedTripletLoss,
    identity_loss,
    pairwise_distance,
    part_alignment_loss,
    part_decorrelation_loss,
    weighted_total,
)
from memory import MemoryRead

HCT = {"id": 1.0, "triplet": 1.0, "center_triplet": 2.0}
MEMORY = {"memory_id": 0.1, "memory_triplet": 1.0}

TRIPLETS = {
    "hetero_center_triplet": HeteroCenterTripletLoss(),
    "batch_hard_triplet": BatchHardTripletLoss(),
    "weighted_regularized_triplet": WeightedRegularizedTripletLoss(),
}


@pytest.mark.parametrize("name", [*TRIPLETS, "label_smooth_ce"])
def test_agrees_with_the_released_losses(name):
    golden = np.load(GOLDEN / "losses.npz")
    if name in TRIPLETS:
        rows = torch.tensor(golden["features"]).requires_grad_()
        value = TRIPLETS[name](rows, torch.tensor(golden["labels"]))
    else:
        rows = torch.tensor(golden["logits"]).requires_grad_()
        value = identity_loss(rows, torch.tensor(golden["targets"]), label_smoothing=0.1)
    value.backward()
    assert value.item() == pytest.approx(golden[f"{name}/loss"].item(), abs=1e-7)
    expected = torch.tensor(golden[f"{name}/grad"])
    assert (rows.grad - expected).abs().max() <= 1e-5 * expected.abs().max()


def batch(ids=4, per_id=3, dim=5, seed=0):
    """Features (2PK, dim) and labels, visible rows first."""
    gen = torch.Generator().manual_seed(seed)
    labels = torch.randperm(50, generator=gen)[:ids].repeat_interleave(per_id).repeat(2)
    return torch.randn(len(labels), dim, generator=gen, dtype=torch.float64), labels


def distance(a, b):
    return math.sqrt(max(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)), 1e-12))


def naive_hetero_center(features, labels, modality, margin=0.3):
    centers = {}
    for label, kind in sorted(set(zip(labels, modality, strict=True))):
        rows = [
            f for f, y, m in zip(features, labels, modality, strict=True) if (y, m) == (label, kind)
        ]
        centers[label, kind] = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    hinges = []
    for (label, _), center in centers.items():
        positive = max(distance(center, c) for (y, _), c in centers.items() if y == label)
        negatives = [distance(center, c) for (y, _), c in centers.items() if y != label]
        hinges.append(max(0.0, margin + positive - min(negatives)) if negatives else 0.0)
    return sum(hinges) / len(hinges)


def naive_batch_hard(features, labels, margin=0.3):
    hinges = []
    for f, y in zip(features, labels, strict=True):
        positive = max(distance(f, g) for g, z in zip(features, labels, strict=True) if z == y)
        negatives = [distance(f, g) for g, z in zip(features, labels, strict=True) if z != y]
        hinges.append(max(0.0, margin + positive - min(negatives)) if negatives else 0.0)
    return sum(hinges) / len(hinges)


def naive_weighted_regularized(features, labels):
    values = []
    for f, y in zip(features, labels, strict=True):
        d = [distance(f, g) for g in features]
        same = [z == y for z in labels]
        peak = max(v if s else 0.0 for v, s in zip(d, same, strict=True))
        far = [math.exp(v - peak) if s else 0.0 for v, s in zip(d, same, strict=True)]
        near = [0.0 if s else math.exp(-v) for v, s in zip(d, same, strict=True)]
        d_far = sum(w * v for w, v in zip(far, d, strict=True)) / (sum(far) + 1e-6)
        d_near = sum(w * v for w, v in zip(near, d, strict=True)) / (sum(near) + 1e-6)
        values.append(math.log1p(math.exp(d_far - d_near)))
    return sum(values) / len(values)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(4, 3), (2, 1), (6, 2), (1, 4)])
def test_triplets_equal_loops(shape, seed):
    features, labels = batch(*shape, seed=seed)
    f, y = features.tolist(), labels.tolist()
    half = [0] * (len(y) // 2) + [1] * (len(y) // 2)
    expected = {
        "hetero_center_triplet": naive_hetero_center(f, y, half),
        "batch_hard_triplet": naive_batch_hard(f, y),
        "weighted_regularized_triplet": naive_weighted_regularized(f, y),
    }
    for name, loss in TRIPLETS.items():
        assert loss(features, labels).item() == pytest.approx(expected[name], abs=1e-10), name


@pytest.mark.parametrize("name", TRIPLETS)
def test_gradcheck_of_triplets(name):
    features, labels = batch(3, 2, dim=3)
    assert torch.autograd.gradcheck(TRIPLETS[name], (features.requires_grad_(), labels))


def test_order_of_the_rows_does_not_matter_to_the_hetero_centre_loss():
    features, labels = batch()
    loss = HeteroCenterTripletLoss()
    expected = loss(features, labels)
    half = len(labels) // 2
    gen = torch.Generator().manual_seed(1)
    within = torch.cat(
        [torch.randperm(half, generator=gen), half + torch.randperm(half, generator=gen)]
    )
    torch.testing.assert_close(loss(features[within], labels[within]), expected)
    across = torch.randperm(2 * half, generator=gen)
    infrared = torch.arange(2 * half) >= half
    torch.testing.assert_close(loss(features[across], labels[across], infrared[across]), expected)


@pytest.mark.parametrize("stripes", [1, 3])
def test_centres_computed_once_give_the_same_loss_from_fewer_distances(stripes, monkeypatch):
    features, labels = batch(per_id=3)
    features = features.unsqueeze(1).repeat(1, stripes, 1).requires_grad_()
    results, sizes = [], []

    def counted(centers):
        sizes.append(centers.shape[1])
        return pairwise_distance(centers)

    monkeypatch.setattr("loss.pairwise_distance", counted)
    for images_per_id in (1, 3):
        loss = HeteroCenterTripletLoss(images_per_id=images_per_id)(features, labels)
        results.append((loss, *torch.autograd.grad(loss, features)))
    torch.testing.assert_close(*results)
    assert sizes == [24, 8]


def test_stripes_are_losses_of_their_own_summed():
    gen = torch.Generator().manual_seed(2)
    features = torch.randn(24, 6, 4, generator=gen, dtype=torch.float64)
    logits = torch.randn(24, 6, 60, generator=gen, dtype=torch.float64)
    labels = batch()[1]
    loss = HeteroCenterTripletLoss(margin=2.0)
    expected = sum(loss(features[:, s], labels) for s in range(6))
    torch.testing.assert_close(loss(features, labels), expected)
    expected = sum(identity_loss(logits[:, s], labels, 0.1) for s in range(6))
    torch.testing.assert_close(identity_loss(logits, labels, 0.1), expected)


def test_identity_loss_is_smoothed_cross_entropy():
    logits = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64)
    log_p = logits[0].log_softmax(0)
    target = [0.1 / 3, 0.9 + 0.1 / 3, 0.1 / 3]
    expected = -sum(t * p for t, p in zip(target, log_p, strict=True))
    torch.testing.assert_close(identity_loss(logits, torch.tensor([1]), 0.1), expected)


@pytest.mark.parametrize("name", TRIPLETS)
@pytest.mark.parametrize("kind", ["single identity", "identical features", "two rows"])
def test_degenerate_batches_give_finite_losses_and_gradients(name, kind):
    features, labels = batch(1 if kind != "identical features" else 3, 2 if kind[0] != "t" else 1)
    if kind == "identical features":
        features = torch.ones_like(features)
    features.requires_grad_()
    value = TRIPLETS[name](features, labels)
    value.backward()
    assert value.isfinite()
    assert features.grad.isfinite().all()
    if name != "weighted_regularized_triplet":
        expected = 0.3 if kind == "identical features" else 0.0
        assert value.item() == pytest.approx(expected, abs=1e-6)


def test_an_identity_in_one_modality_only_is_its_own_positive():
    features, labels = batch(3, 1)
    labels = labels.clone()
    labels[0] = 99  # seen in visible only; the infrared row keeps the former label
    half = [0, 0, 0, 1, 1, 1]
    expected = naive_hetero_center(features.tolist(), labels.tolist(), half)
    value = HeteroCenterTripletLoss()(features, labels)
    assert value.item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("name", TRIPLETS)
def test_shape_errors_name_both_shapes(name):
    with pytest.raises(ValueError, match=r"\(3,\) for features of shape \(4, 2\)"):
        TRIPLETS[name](torch.zeros(4, 2), torch.zeros(3, dtype=torch.long))


def test_an_odd_batch_needs_the_modality():
    with pytest.raises(ValueError, match="even size, got 3"):
        HeteroCenterTripletLoss()(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))


def test_alignment_compares_the_halves_of_the_order():
    gen = torch.Generator().manual_seed(3)
    read = torch.randn(2, 3, 12, 4, generator=gen)
    order = [4, 0, 5, 2, 1, 3]
    stripes = [read[:, :, 2 * s : 2 * s + 2] for s in range(6)]
    first = torch.cat([stripes[s] for s in order[:3]])
    second = torch.cat([stripes[s] for s in order[3:]])
    torch.testing.assert_close(part_alignment_loss(read, order), ((first - second) ** 2).mean())
    with pytest.raises(ValueError, match="height 12 does not divide into 5"):
        part_alignment_loss(read, range(5))
    with pytest.raises(ValueError, match="1 >= 2"):
        part_alignment_loss(read, [0])


def test_alignment_of_an_odd_number_leaves_one_stripe_out():
    read = torch.randn(1, 2, 3, 1)
    expected = ((read[:, :, 2] - read[:, :, 0]) ** 2).mean()
    torch.testing.assert_close(part_alignment_loss(read, [2, 0, 1]), expected)


@pytest.mark.parametrize("order", [[1, 0], [2, 0, 1], [3, 1, 4, 0, 5, 2]])
@pytest.mark.parametrize("channels_last", [False, True])
def test_alignment_gradcheck(order, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    read = torch.randn(2, 3, 2 * len(order), 2, dtype=torch.float64)
    read = read.contiguous(memory_format=layout).requires_grad_()
    assert torch.autograd.gradcheck(lambda read: part_alignment_loss(read, order), read)


def test_decorrelation_by_hand():
    gen = torch.Generator().manual_seed(4)
    read = torch.randn(3, 5, 4, 2, generator=gen, dtype=torch.float64)
    expected = 0.0
    for image in read:
        z = torch.stack([image[:, 2 * s : 2 * s + 2].mean(dim=(1, 2)) for s in range(2)], dim=1)
        gram = (z.t() @ z / 3).tolist()
        expected += sum((gram[i][i] - 1) ** 2 for i in range(2))
        expected += 0.051 * sum(gram[i][j] ** 2 for i in range(2) for j in range(2) if i != j)
    assert part_decorrelation_loss(read, 2).item() == pytest.approx(expected / 200)


def outputs(kind):
    gen = torch.Generator().manual_seed(5)
    labels = torch.arange(3).repeat_interleave(2).repeat(2)
    draw = lambda *shape: torch.randn(12, *shape, generator=gen)  # noqa: E731
    out = {"feat": draw(24)}
    if kind.startswith(("agw", "global")):
        out["logits"] = draw(7)
    else:
        out |= {"part_feats": draw(6, 4), "part_logits": draw(6, 7)}
    if "sg" in kind or "mg" in kind:
        semantic = draw(8, 6, 2) if "mg" in kind else None
        out |= {"memory_feat": draw(8), "memory_logits": draw(7)}
        out["memory_read"] = MemoryRead(draw(8, 6, 2), None, semantic)
    return out, labels


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("pcb", HCT),
        ("pcb sg", {**HCT, **MEMORY}),
        ("pcb mg", {**HCT, **MEMORY, "alignment": 0.1}),
        ("agw", {"id": 1.0, "triplet": 1.0}),
        ("global", {"id": 1.0, "triplet": 1.0}),
        ("agw mg", {"id": 1.0, "triplet": 1.0, **MEMORY, "alignment": 0.1}),
    ],
)
def test_criterion_gives_the_terms_it_was_given_weights_for(kind, weights):
    out, labels = outputs(kind)
    head = kind.split()[0]
    terms = Criterion(weights, head=head)(out, labels, list(range(6)))
    assert list(terms) == list(weights)
    total = weighted_total(terms, weights)
    expected = sum(weights[k] * v for k, v in terms.items())
    torch.testing.assert_close(total, expected - (0.01 if "alignment" in terms else 0))
    triplet = TRIPLETS["weighted_regularized_triplet" if head == "agw" else "hetero_center_triplet"]
    torch.testing.assert_close(terms["triplet"], triplet(out["feat"], labels))


def test_terms_of_weight_zero_are_left_out_and_unknown_ones_refused():
    out, labels = outputs("pcb mg")
    weights = {**HCT, "center_triplet": 0.0, "alignment": 0.0, "decorrelation": 0.01}
    terms = Criterion(weights)(out, labels, list(range(6)))
    assert set(terms) == {"id", "triplet", "decorrelation"}
    with pytest.raises(ValueError, match="there is no loss term .modality_gap."):
        Criterion({"modality_gap": 1.0})


def test_half_precision_reads_are_compared_in_float32():
    out, labels = outputs("pcb mg")
    half = {**out, "memory_read": MemoryRead(out["memory_read"].part.bfloat16())}
    terms = Criterion({"alignment": 1.0, "decorrelation": 1.0})(half, labels, list(range(6)))
    assert {t.dtype for t in terms.values()} == {torch.float32}
