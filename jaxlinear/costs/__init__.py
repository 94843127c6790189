"""What a program costs: rates of devices, products in jaxprs, memory and exchanges in compiled programs."""
