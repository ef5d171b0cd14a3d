"""The combination's side on Ray: `validation` decodes the images that judge, where they are not decoded yet."""
