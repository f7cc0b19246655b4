-- The name of the key before the present one, which signs too until then.
alter table webhooks add column old_secret text;
alter table webhooks add column old_until_ms {int};
