// sqlclient asks a runstream server through the official ClickHouse driver for Go, over HTTP, as Grafana's plugin does.
//
// It reads one question a line from standard input, as JSON, and answers each with one line of JSON.
package main

import (
	"bufio"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
)

type question struct {
	Address     string            `json:"address"`
	User        string            `json:"user"`
	Password    string            `json:"password"`
	Database    string            `json:"database"`
	API         string            `json:"api"` // "native" (the driver's own) or "sql" (database/sql)
	Compression string            `json:"compression"`
	SQL         string            `json:"sql"`
	Parameters  map[string]string `json:"parameters"`
	Settings    map[string]any    `json:"settings"`
	CountOnly   bool              `json:"count_only"` // sum the first column, a UInt64, and return no rows
	DeadlineMS  int               `json:"deadline_ms"`
	CancelMS    int               `json:"cancel_ms"`
}

type answer struct {
	Columns []string `json:"columns"`
	Types   []string `json:"types"`
	Rows    [][]any  `json:"rows"`
	Count   uint64   `json:"count"`
	Sum     uint64   `json:"sum"`
	Server  string   `json:"server"`
	Error   string   `json:"error"`
	Code    int32    `json:"code"`
	Seconds float64  `json:"seconds"`
}

var compressions = map[string]clickhouse.CompressionMethod{
	"none": clickhouse.CompressionNone, "lz4": clickhouse.CompressionLZ4,
	"zstd": clickhouse.CompressionZSTD, "gzip": clickhouse.CompressionGZIP,
	"deflate": clickhouse.CompressionDeflate, "br": clickhouse.CompressionBrotli,
}

func (q question) options() *clickhouse.Options {
	options := &clickhouse.Options{
		Protocol: clickhouse.HTTP,
		Addr:     []string{q.Address},
		Auth:     clickhouse.Auth{Database: q.Database, Username: q.User, Password: q.Password},
		Settings: clickhouse.Settings{},
	}
	if method, known := compressions[q.Compression]; known {
		options.Compression = &clickhouse.Compression{Method: method, Level: 1}
	}
	for name, value := range q.Settings {
		options.Settings[name] = value
	}
	return options
}

func (q question) context() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.Background())
	if q.DeadlineMS > 0 {
		ctx, cancel = context.WithTimeout(context.Background(), time.Duration(q.DeadlineMS)*time.Millisecond)
	}
	if q.CancelMS > 0 {
		time.AfterFunc(time.Duration(q.CancelMS)*time.Millisecond, cancel)
	}
	if len(q.Parameters) > 0 {
		ctx = clickhouse.Context(ctx, clickhouse.WithParameters(clickhouse.Parameters(q.Parameters)))
	}
	return ctx, cancel
}

// rows is what the two interfaces have in common.
type rows interface {
	Next() bool
	Scan(dest ...any) error
	Err() error
	Close() error
}

func (q question) ask(found *answer) error {
	ctx, cancel := q.context()
	defer cancel()
	if q.API == "sql" {
		db := clickhouse.OpenDB(q.options())
		defer db.Close()
		if err := db.PingContext(ctx); err != nil {
			return err
		}
		result, err := db.QueryContext(ctx, q.SQL)
		if err != nil {
			return err
		}
		defer result.Close()
		types, err := result.ColumnTypes()
		if err != nil {
			return err
		}
		for _, each := range types {
			found.Columns = append(found.Columns, each.Name())
			found.Types = append(found.Types, each.DatabaseTypeName())
		}
		return q.read(result, func() []any { return anySQL(types) }, found)
	}
	conn, err := clickhouse.Open(q.options())
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.Ping(ctx); err != nil {
		return err
	}
	version, err := conn.ServerVersion()
	if err != nil {
		return err
	}
	found.Server = version.String()
	result, err := conn.Query(ctx, q.SQL)
	if err != nil {
		return err
	}
	defer result.Close()
	types := result.ColumnTypes()
	for _, each := range types {
		found.Columns = append(found.Columns, each.Name())
		found.Types = append(found.Types, each.DatabaseTypeName())
	}
	return q.read(result, func() []any {
		places := make([]any, len(types))
		for n, each := range types {
			places[n] = newOf(each.ScanType())
		}
		return places
	}, found)
}

func (q question) read(result rows, places func() []any, found *answer) error {
	for result.Next() {
		found.Count++
		if q.CountOnly {
			var first uint64
			if err := result.Scan(&first); err != nil {
				return err
			}
			found.Sum += first
			continue
		}
		row := places()
		if err := result.Scan(row...); err != nil {
			return err
		}
		for n := range row {
			row[n] = plain(row[n])
		}
		found.Rows = append(found.Rows, row)
	}
	return result.Err()
}

func anySQL(types []*sql.ColumnType) []any {
	places := make([]any, len(types))
	for n := range types {
		places[n] = new(any)
	}
	return places
}

func main() {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 64<<20)
	out := json.NewEncoder(os.Stdout)
	for lines.Scan() {
		var asked question
		found := answer{}
		began := time.Now()
		err := json.Unmarshal(lines.Bytes(), &asked)
		if err == nil {
			err = asked.ask(&found)
		}
		found.Seconds = time.Since(began).Seconds()
		if err != nil {
			found.Error = err.Error()
			var exception *clickhouse.Exception
			if errors.As(err, &exception) {
				found.Code = exception.Code
			}
		}
		if err := out.Encode(found); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
}
