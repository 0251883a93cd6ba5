"""From raw trees to packed stores: rendering, reading, verifying and packing the data sets, and backbone weights."""
