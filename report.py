"""Stage 5: one self-contained HTML page that shows what any set of runs did and found.

A view, not a run: it reads run directories and writes one file, which opens from disk without any
network. The file carries a hash of everything it was made from; while that holds, it is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import args

if __name__ == "__main__":
    args.answer_quick_questions("report")


import util
from reporting.material import gather, shown_eeg
from reporting.page import page_context, page_hash, recorded_hash, render_page, wanted_pictures
from reporting.thumbnails import make_thumbnails
from rundirs.closing import tell_end
from rundirs.files import atomic_write


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or nothing when it shows the same already. Prints its path."""
    values = args.resolve("report", argv).values
    material = gather(values.runs, values.data_path, values.cache_dir, values.dataset)
    output = values.output or Path(values.runs[0]).resolve().parent / "report.html"
    earlier = recorded_hash(output)
    hashes, large = wanted_pictures(material)
    inputs = page_hash(material.runs, material.world, hashes, [run.label for run in material.runs])
    if values.dry_run:
        print(
            "dry run, nothing was written. Would:\n"
            f"  - show {len(material.runs)} runs, {len(hashes)} pictures and the EEG of "
            f"{len(shown_eeg(material.world))} subjects\n  - write to {output}"
        )
        return 0
    if earlier == inputs:
        print(f"already up to date: {output}")
        return 0
    util.start_log(None)
    util.LOG.info("encoding %d pictures", len(hashes))
    thumbs = make_thumbnails(hashes, large)
    page = render_page(page_context(material, thumbs), inputs)
    with atomic_write(output) as file:
        file.write(page)
    tell_end({"report": output}, [])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
