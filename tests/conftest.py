"""What several test files share."""

import pytest
from hypothesis import settings

# A busy machine is no failure, and what one run of the tests found must not change the next.
settings.register_profile("kit", deadline=None, database=None)
settings.load_profile("kit")


@pytest.fixture(scope="session")
def phantom_data(tmp_path_factory):
    """Three training runs and one test run of 40 x 64 x 64 voxels in the competition's layout; not to be changed."""
    from kaggle_utils.phantom import write_phantom

    return write_phantom(tmp_path_factory.mktemp("phantom_data"), runs=3, test_runs=1, shape=(40, 64, 64), seed=0)


@pytest.fixture(scope="module")
def one_thread():
    """Networks as small as the tests' only wait for each other's threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
