"""Runs rounds, keeps the log, flashes boards, talks to people."""
