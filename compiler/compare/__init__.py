"""Artifacts side by side: the same work through each, and what differs beyond noise."""
