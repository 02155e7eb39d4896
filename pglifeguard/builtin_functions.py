"""Names that `effects.py` meets before a parenthesis and need not doubt."""

_NOT_CALLED = """
    all and any array as copy asc between bit by case char character conflict constraint cross cube current decimal
    default desc distinct do else end escape except exists filter first for from full group having identity ilike in
    inner intersect interval into is join key last lateral left like limit materialized natural not null nullif
    nulls numeric offset on operator or order outer over partition primary range recursive returning right rollup
    row rows select set sets similar some symmetric table tablesample then time timestamp to union unique update
    using values varchar varying when where window with within without
"""
_HARMLESS = """
    abs acos age array_agg array_append array_cat array_dims array_fill array_length array_lower array_ndims
    array_position array_positions array_prepend array_remove array_replace array_sample array_shuffle array_to_json
    array_to_string array_upper ascii asin atan atan2 avg bit_and bit_count bit_length bit_or bit_xor bool_and
    bool_or bound btrim cardinality cast cbrt ceil ceiling char_length character_length chr clock_timestamp coalesce
    col_description collation concat concat_ws convert_from convert_to corr cos cot count covar_pop covar_samp
    cume_dist current_database current_date current_query current_schema current_schemas current_setting
    current_time current_timestamp current_user currval date date_add date_bin date_part date_subtract date_trunc
    datemultirange daterange decode degrees dense_rank div encode every exp extract factorial first_value float
    floor format format_type gcd gen_random_uuid generate_series generate_subscripts get_bit get_byte greatest
    grouping has_any_column_privilege has_column_privilege has_database_privilege has_function_privilege
    has_schema_privilege has_sequence_privilege has_table_privilege host inet_client_addr inet_server_addr
    inet_server_port initcap int4multirange int4range int8multirange int8range isempty isfinite json json_agg
    json_agg_strict json_array json_array_elements json_array_elements_text json_array_length json_arrayagg
    json_build_array json_build_object json_each json_each_text json_exists json_extract_path json_extract_path_text
    json_object json_object_agg json_object_keys json_objectagg json_populate_record json_populate_recordset
    json_query json_serialize json_strip_nulls json_table json_to_record json_to_recordset json_typeof json_value
    jsonb jsonb_agg jsonb_array_elements jsonb_array_elements_text jsonb_array_length jsonb_build_array
    jsonb_build_object jsonb_each jsonb_each_text jsonb_extract_path jsonb_extract_path_text jsonb_insert
    jsonb_object jsonb_object_agg jsonb_object_keys jsonb_path_exists jsonb_path_match jsonb_path_query
    jsonb_path_query_array jsonb_path_query_first jsonb_populate_record jsonb_populate_recordset jsonb_pretty
    jsonb_set jsonb_set_lax jsonb_strip_nulls jsonb_to_record jsonb_to_recordset jsonb_typeof justify_days
    justify_hours justify_interval lag last_value lastval lcm lead least left length ln localtime localtimestamp log
    log10 lower lower_inc lower_inf lpad ltrim make_date make_interval make_time make_timestamp make_timestamptz
    masklen max md5 min mod mode multirange network nextval normalize now nth_value ntile num_nonnulls num_nulls
    nummultirange numrange obj_description octet_length overlaps overlay parse_ident percent_rank percentile_cont
    percentile_disc pg_advisory_unlock pg_advisory_unlock_all pg_advisory_unlock_shared pg_backend_pid
    pg_blocking_pids pg_cancel_backend pg_client_encoding pg_column_size pg_current_snapshot
    pg_current_wal_flush_lsn pg_current_wal_insert_lsn pg_current_wal_lsn pg_current_xact_id
    pg_current_xact_id_if_assigned pg_database_size pg_encoding_to_char pg_get_constraintdef pg_get_expr
    pg_get_functiondef pg_get_indexdef pg_get_serial_sequence pg_get_userbyid pg_get_viewdef pg_indexes_size
    pg_is_in_recovery pg_is_wal_replay_paused pg_last_wal_receive_lsn pg_last_wal_replay_lsn
    pg_last_xact_replay_timestamp pg_postmaster_start_time pg_relation_size pg_size_pretty pg_sleep pg_sleep_for
    pg_sleep_until pg_stat_get_activity pg_table_is_visible pg_table_size pg_terminate_backend
    pg_total_relation_size pg_typeof pg_wal_lsn_diff pg_walfile_name phraseto_tsquery pi plainto_tsquery position
    power quote_ident quote_literal quote_nullable radians random random_normal range_agg range_intersect_agg
    range_merge rank regexp_count regexp_instr regexp_like regexp_match regexp_matches regexp_replace
    regexp_split_to_array regexp_split_to_table regexp_substr regr_slope repeat replace reverse right round
    row_number row_to_json rpad rtrim scale session_user setval setweight sha224 sha256 sha384 sha512
    shobj_description sign similarity sin split_part sqrt starts_with statement_timestamp stddev stddev_pop
    stddev_samp strict_word_similarity string_agg string_to_array string_to_table strip strpos substr substring sum
    tan tanh timeofday timezone to_ascii to_char to_date to_hex to_json to_jsonb to_number to_regclass to_regproc
    to_regrole to_regtype to_timestamp to_tsquery to_tsvector transaction_timestamp translate treat trim trim_array
    trim_scale trunc ts_headline ts_rank ts_rank_cd tsmultirange tsrange tstzmultirange tstzrange unaccent unistr
    unnest upper upper_inc upper_inf uuid_extract_timestamp uuid_extract_version uuidv4 uuidv7 var_pop var_samp
    variance version websearch_to_tsquery width_bucket word_similarity xmlagg xmlelement xmlforest xmlparse xpath
"""

# Words of SQL that stand before a parenthesis, and types with a length.
NOT_CALLED = frozenset(_NOT_CALLED.split())
# Functions of PostgreSQL and of its usual extensions that change neither session nor transaction.
HARMLESS = frozenset(_HARMLESS.split())
