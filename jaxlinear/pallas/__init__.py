"""The operations as kernels for TPU and GPU, in Pallas. Called by ``jaxlinear.ops`` alone, which says what they compute."""
