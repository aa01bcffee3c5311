"""For authors and training scripts: low-rank arithmetic, SVDs, rotations, calibration, optimizer groups."""
