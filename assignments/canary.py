"""Three tests that fail. Where one of them passes, something has changed what a test is.

They run after a blank's own tests, in the same process and session of pytest.
"""

import torch


def test_canary_assert():
    seen, expected = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])
    assert seen.tolist() == expected.tolist()


def test_canary_close():
    torch.testing.assert_close(torch.zeros(2, 3), torch.full((2, 3), 0.5))


def test_canary_equal():
    seen, expected = torch.arange(4), torch.arange(1, 5)
    assert torch.equal(seen, expected) or torch.allclose(seen.float(), expected.float())
