-- One row per fact about the database itself.
create table meta (
  key text primary key not null,
  value text not null
){strict};

create table tenants (
  name text primary key not null,
  weight {int} not null,
  running_max {int},
  pending_max {int},
  retention text,
  hold {int} not null,
  created_ms {int} not null
){strict};

create table queues (
  name text primary key not null,
  pool text not null,
  weight {int} not null,
  running_max {int},
  paused_ms {int},
  paused_by text,
  paused_reason text,
  created_ms {int} not null
){strict};

-- Who schedules a pool.
create table leaders (
  pool text primary key not null,
  holder text not null,
  epoch {int} not null,
  until_ms {int} not null
){strict};

-- What was asked, never changed; kept apart so that the rows that change stay small.
create table requests (
  job text primary key not null,
  body text not null
){strict};

-- Jobs that are not over. A job is here or in history, never in both.
create table jobs (
  id text primary key not null references requests (job),
  tenant text not null,
  pool text not null,
  queue text not null,
  kind text not null,
  name text not null,
  priority {int} not null,
  cpus {int} not null,
  memory {int} not null,
  disk {int} not null,
  timeout_ms {int} not null,
  requires text not null,
  grp text,
  tags text not null,
  labels text not null,
  submitted_by text not null,
  notify_url text,
  created_ms {int} not null,
  state text not null,
  attempts {int} not null,
  attempts_max {int} not null,
  ready_ms {int} not null,
  avoid text not null,
  reason text not null,
  estimate text,
  phase text,
  worker text,
  life {int} not null,
  epoch {int} not null,
  leased_ms {int},
  until_ms {int},
  started_ms {int},
  cancel_ms {int},
  cancel_by text,
  cancel_reason text,
  event_seq {int} not null,
  log_next {int} not null
){strict};
create index jobs_queue on jobs (pool, state, priority, created_ms);
create index jobs_worker on jobs (worker) where worker is not null;
create index jobs_group on jobs (tenant, grp) where grp is not null;
create index jobs_tenant on jobs (tenant, created_ms, id);
create index jobs_created on jobs (created_ms, id);

-- Jobs that are over.
create table history (
  id text primary key not null references requests (job),
  tenant text not null,
  pool text not null,
  queue text not null,
  kind text not null,
  name text not null,
  priority {int} not null,
  cpus {int} not null,
  memory {int} not null,
  tags text not null,
  labels text not null,
  submitted_by text not null,
  notify_url text,
  created_ms {int} not null,
  attempts {int} not null,
  worker text,
  leased_ms {int},
  started_ms {int},
  finished_ms {int} not null,
  verdict text not null,
  outcome text not null,
  receipt text,
  observed text,
  cancel_ms {int},
  cancel_by text,
  cancel_reason text,
  event_seq {int} not null,
  log_next {int} not null,
  tier text not null,
  hold {int} not null
){strict};
create index history_tenant on history (tenant, created_ms, id);
create index history_created on history (created_ms, id);
create index history_finished on history (tier, finished_ms);

create table attempts (
  job text not null,
  number {int} not null,
  worker text not null,
  life {int} not null,
  epoch {int} not null,
  leased_ms {int} not null,
  started_ms {int},
  ended_ms {int},
  verdict text,
  outcome text,
  primary key (job, number)
){strict};

create table artifacts (
  job text not null references requests (job),
  name text not null,
  attempt {int} not null,
  digest text not null,
  size {int} not null,
  media_type text not null,
  at_ms {int} not null,
  primary key (job, name)
){strict};

create table events (
  job text not null,
  seq {int} not null,
  at_ms {int} not null,
  kind text not null,
  data text not null,
  primary key (job, seq)
){strict};

create table idempotency (
  tenant text not null,
  key text not null,
  body text not null,
  job text not null,
  created_ms {int} not null,
  primary key (tenant, key)
){strict};
create index idempotency_created on idempotency (created_ms);

create table webhooks (
  id text primary key not null,
  tenant text,
  url text not null,
  secret text not null,
  kinds text not null,
  enabled {int} not null,
  created_ms {int} not null,
  created_by text not null
){strict};

-- Webhooks that wait to be sent, written with the change they tell of.
create table outbox (
  id text primary key not null,
  job text not null,
  tenant text not null,
  webhook text,
  url text not null,
  seq {int} not null,
  kind text not null,
  body text not null,
  created_ms {int} not null,
  due_ms {int} not null,
  tries {int} not null,
  dead_ms {int},
  last_error text
){strict};
create index outbox_due on outbox (due_ms) where dead_ms is null;
create index outbox_dead on outbox (dead_ms, id) where dead_ms is not null;

-- The hash chain of the audit log comes with the columns it needs.
create table audit (
  seq {serial},
  at_ms {int} not null,
  actor text not null,
  tenant text,
  action text not null,
  target text not null,
  allowed {int} not null,
  reason text,
  detail text,
  prev_hash text,
  hash text
){strict};
create index audit_tenant on audit (tenant, seq);
create index audit_at on audit (at_ms);

create table workers (
  id text primary key not null,
  pool text not null,
  labels text not null,
  tenants text,
  facts text not null,
  state text not null,
  state_by text,
  state_reason text,
  lost {int} not null,
  seen_ms {int} not null,
  joined_ms {int} not null,
  infra_failures {int} not null,
  fingerprint text,
  fingerprint_until_ms {int},
  removed_ms {int}
){strict};
create unique index workers_fingerprint on workers (fingerprint) where fingerprint is not null;

create table join_tokens (
  id text primary key not null,
  hash text not null unique,
  pool text not null,
  labels text not null,
  tenants text,
  created_ms {int} not null,
  created_by text not null,
  expires_ms {int} not null,
  used_ms {int},
  used_by text,
  revoked_ms {int}
){strict};

create table tokens (
  id text primary key not null,
  hash text not null unique,
  tenant text not null,
  role text not null,
  scopes text not null,
  claims text not null,
  description text not null,
  created_ms {int} not null,
  created_by text not null,
  expires_ms {int},
  revoked_ms {int},
  last_used_ms {int}
){strict};
create index tokens_tenant on tokens (tenant, id);

-- Short-lived tokens that were called back before their end.
create table revoked (
  id text primary key not null,
  until_ms {int} not null
){strict};
create index revoked_until on revoked (until_ms);
