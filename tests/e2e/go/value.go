package main

import (
	"fmt"
	"math"
	"math/big"
	"reflect"
	"time"
)

// newOf makes a pointer to a zero value of a column's type.
func newOf(kind reflect.Type) any {
	return reflect.New(kind).Interface()
}

// plain turns what the driver scanned into a value that JSON can carry without loss.
func plain(value any) any {
	found := reflect.ValueOf(value)
	for found.Kind() == reflect.Pointer || found.Kind() == reflect.Interface {
		if found.IsNil() {
			return nil
		}
		if number, is := found.Interface().(*big.Int); is {
			return number.String()
		}
		found = found.Elem()
	}
	switch typed := found.Interface().(type) {
	case time.Time:
		return typed.UTC().Format(time.RFC3339Nano)
	case big.Int:
		return typed.String()
	case fmt.Stringer:
		return typed.String()
	}
	switch found.Kind() {
	case reflect.Float32, reflect.Float64:
		if number := found.Float(); math.IsNaN(number) || math.IsInf(number, 0) {
			return fmt.Sprint(number)
		}
	case reflect.Uint64, reflect.Int64:
		return fmt.Sprint(found.Interface())
	case reflect.Slice, reflect.Array:
		items := make([]any, found.Len())
		for n := range items {
			items[n] = plain(found.Index(n).Interface())
		}
		return items
	case reflect.Map:
		items := map[string]any{}
		for _, key := range found.MapKeys() {
			items[fmt.Sprint(plain(key.Interface()))] = plain(found.MapIndex(key).Interface())
		}
		return items
	}
	return found.Interface()
}
