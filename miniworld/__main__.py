"""Write the embedded world: procedural pictures, simulated EEG, miniature models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import args

if __name__ == "__main__":
    args.answer_quick_questions("world")

import numpy as np

import util
from miniworld import eeg, models, pictures
from miniworld.brain_features import brain_features
from rundirs.directory import open_run


def rendered(scenes: Sequence[pictures.Scene]) -> Iterator[np.ndarray]:
    """The pictures of the scenes, uint8 [H, W, 3] each, one at a time."""
    return (pictures.render(scene) for scene in scenes)


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    """Write ``data/`` (THINGS-EEG2 layout) and ``models/``, or do nothing if they are finished."""
    options = args.resolve("world", argv)
    values = options.values
    snr = eeg.DEFAULT_SNR if values.snr is None else values.snr
    root = values.output_path
    planned = pictures.plan_scenes(
        values.training_concepts,
        values.images_per_concept,
        values.test_concepts,
        values.seed,
        values.test_split,
    )
    plan = (
        f"draw {sum(map(len, planned.values()))} pictures into {root / 'data'}",
        f"simulate the EEG of {values.subjects} people at SNR {snr}",
        f"put {values.weights} miniature CLIP, SDXL and IP-Adapter into {root / 'models'}",
    )
    run = open_run(options, root, {}, plan)
    if run.finished:
        return 0
    scenes = pictures.write_stimuli(root / "data", planned, values.seed)
    repetitions = {"training": values.training_repetitions, "test": values.test_repetitions}
    features = {
        name: brain_features(rendered(items), items, values.seed) for name, items in scenes.items()
    }
    for number in range(1, values.subjects + 1):
        util.LOG.info("simulating the EEG of sub-%02d at SNR %s", number, snr)
        eeg.write_subject(
            root / "data", f"sub-{number:02d}", features, repetitions, snr, values.seed
        )
    if values.weights == "trained":
        models.trained_models(root / "models")
    else:
        models.random_models(root / "models", values.seed)
    run.finish({"simulated": True, "snr": snr})
    print(f"embedded world (SIMULATED EEG): {root}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
