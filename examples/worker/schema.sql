CREATE TABLE jobs (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, recipient text NOT NULL, done_at timestamptz, error text);
CREATE INDEX ix_jobs_waiting ON jobs (id) WHERE done_at IS NULL;
CREATE TABLE letters (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, recipient text NOT NULL CHECK (recipient <> ''));
