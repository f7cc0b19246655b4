-- Controllers that share this database: where the others reach each.
create table controllers (
  id text primary key not null,
  process text not null,
  url text,
  keys text not null,
  seen_ms {int} not null
){strict};

-- The controller that keeps the log of an attempt while it is written; empty before the first piece.
alter table jobs add column log_home text not null default '';
alter table attempts add column log_home text not null default '';
