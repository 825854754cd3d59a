"""What a candidate costs: sites, calibration, groups, scales, quantization, losses, folding."""
