"""The far end of the wire: receives, keeps and shows what the boxes saw."""
