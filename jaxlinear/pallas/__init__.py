"""TPU and GPU kernels of the operations, in Pallas. Called only by ``jaxlinear.ops``, which defines what they compute."""
