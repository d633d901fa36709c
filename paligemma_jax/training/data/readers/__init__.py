"""One module per format of data sets, each with `read(found, settings) -> Examples`."""
