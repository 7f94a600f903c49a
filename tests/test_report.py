"""Pictures that users draw themselves."""

import pytest
import torch

import visattn
from visattn import report


def test_attention_is_drawn_over_an_image_of_bytes_or_of_floats(tmp_path):
    image = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = [(2, 3), (7, 0)]
    maps = visattn.attention_rows(visattn.Attention(4), torch.randn(2, 4, 8, 8), torch.tensor(pixels))
    drawn = []
    for given, weights in ((image, maps[0]), (image / 255, maps[0].detach().double()), (image, maps[0].detach().flip(0))):
        report.attention_maps(tmp_path / "maps.png", given, weights, pixels, "title")
        drawn.append((tmp_path / "maps.png").read_bytes())
    assert drawn[0].startswith(b"\x89PNG")
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("image", "weights", "said"),
    [
        ((2, 3, 8, 8), (1, 4, 4), "image must be"),
        ((2, 8, 8), (1, 4, 4), "image must be"),
        ((3, 8, 8), (1, 1, 4, 4), "one image's part"),
        ((3, 8, 8), (2, 4, 4), "one image's part"),
    ],
)
def test_what_does_not_fit_is_not_drawn(tmp_path, image, weights, said):
    with pytest.raises(ValueError, match=said):
        report.attention_maps(tmp_path / "maps.png", torch.zeros(image), torch.rand(weights), [(0, 0)], "title")
    assert not list(tmp_path.iterdir())
