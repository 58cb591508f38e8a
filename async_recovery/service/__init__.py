"""The service: jobs that live in a process of their own, watched and steered over HTTP (extra ``service``)."""
