"""The drafts of a target through the nights: immutable versions, the champion among them, and what is said of both."""
