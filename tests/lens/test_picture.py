"""Pictures can be drawn, whatever tokens hold."""

import io

from PIL import Image
from reports import hand_made_lens, nasty_report

from layerskip.lens import Agreement


def colours(png):
    image = Image.open(io.BytesIO(png)).convert("RGB")
    return image.size, {colour for _, colour in image.getcolors(maxcolors=1 << 24)}


def test_report():
    from layerskip.lens.report import AGREES, draw_report

    report = nasty_report()
    size, found = colours(draw_report(report))
    assert tuple(bytes.fromhex(AGREES[1:])) in found
    fewer, _ = colours(draw_report(report.part(range(2, 4))))
    assert fewer[0] < size[0]


def test_agreement():
    from layerskip.lens.report import draw_agreement

    agreement = Agreement.of(hand_made_lens([[7, 7, 7, 7], [1, 7, 7, 7]]))
    _, found = colours(draw_agreement(agreement, "a $model$"))
    assert {(0x25, 0xA1, 0x8E), (0x35, 0x54, 0xA5)} <= found
