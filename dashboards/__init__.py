"""What people see: figures, the report, the dashboard server.

- ``_page``: pages of one file: their frame, what may run on them, figures and sections
- ``access``: who may ask a server: by Host, token and origin
- ``checked_frames``: data frames as the figures and the report expect them: required columns, finite numbers
- ``compression_report``: one self-contained HTML page that explains a joint compression
- ``connections``: how long and how many connections a server keeps
- ``figures``: plotly figures of sites, alphas and histories
- ``guard``: access rules of the Optuna dashboard: who may ask, what may be changed, what artifacts may do
- ``listening``: sockets to serve on, with a remedy for every way that binding fails
- ``report``: one self-contained HTML page that explains a run: no network, no rights, readable on a phone
- ``server``: the dashboard server: Optuna's dashboard on our storage, behind the guard, on a threaded server
- ``site_table``: the per-site table of the report: what is shown and what it is sorted by
- ``study_views``: our figures and a note inside the Optuna dashboard
- ``text``: results as short sentences and labelled lines, the same in the report, in a study's note and in a terminal
- ``verdict``: what a run came to, in the same words in a terminal and in the report: the verdict, the whole model, what is left to do
"""

__all__ = [
    "access",
    "checked_frames",
    "compression_report",
    "connections",
    "figures",
    "guard",
    "listening",
    "report",
    "server",
    "site_table",
    "study_views",
    "text",
    "verdict",
]
